"""Support for tests of mpilm: faults injected into a running job."""
