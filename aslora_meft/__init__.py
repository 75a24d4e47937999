"""The command line and the recipes over the methods: `aslora-meft train` and `aslora-meft export`."""
