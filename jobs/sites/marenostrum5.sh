# MareNostrum 5 (BSC): SLURM. Not run there.
# https://www.bsc.es/supportkc/docs/MareNostrum5/intro, 2026-11-29. That guide names the modules and the flags --account and
# --qos of your project; this file loads no module, so name your environment: MPILM_VENV=PATH, or write your own site file.
