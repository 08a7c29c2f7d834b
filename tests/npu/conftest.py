"""What the tests of the NPU tool chain share."""

collect_ignore_glob = ["faults/*"]  # kernels that are read, and never run
