"""What is written: adapters, exports, and adapters made of others."""
