"""Many requests at the same time, in threads and processes: their answers equal those of the same requests one by one."""
