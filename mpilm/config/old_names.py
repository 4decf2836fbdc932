"""Names and values that settings had before. Stored configs load with them for ever; flags and --config files may use them for
one version, with a warning."""

OLD_NAMES = {"parallel.compress": "parallel.powersgd_rank", "train.gpu_aware_mpi": "train.device_transport"}
OLD_VALUES = {  # old -> new, by setting; booleans as words
    "parallel.reduce": {"shared": "shared-memory", "sent": "messages"},
    "train.device_transport": {"true": "gpu-aware-mpi", "false": "mpi"},
    "checkpoint.allow_change": OLD_NAMES,
    "drill": {"true": "kill"},
}
