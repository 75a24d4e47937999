"""What is written: adapters, training states and exports."""
