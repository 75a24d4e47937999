"""How long a training step of ASLoRA takes beside LoRA."""
