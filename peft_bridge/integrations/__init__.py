"""Functions of PEFT and transformers that know only the methods inside PEFT."""
