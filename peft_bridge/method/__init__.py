"""What a method is built from: its configuration, its tuner, its adapter file, its name in PEFT."""
