"""Past one machine: a training client whose model is computed by several replicas, which may be lost one by one."""
