"""How good are adapters of ASLoRA beside those of LoRA and VeRA? Run by `benchmarks.aslora_quality`."""
