"""The double is a package for other processes: it is put on their path, and never imported in this one."""

collect_ignore = ["packages"]
