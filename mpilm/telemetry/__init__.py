"""Telemetry of a run: metrics, console output, live view, memory, traces and trackers."""
