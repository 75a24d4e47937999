"""How good are adapters of ASLoRA beside those of LoRA and VeRA? Run by `bench_aslora_quality.py`."""
