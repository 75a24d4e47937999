"""Is ASLoRA better than LoRA on classification, and does its choice of layers help? `benchmarks.aslora_classify`."""
