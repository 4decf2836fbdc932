"""One HTML page of a run folder, or of several compared: read the folder, describe the charts, fill the template."""
