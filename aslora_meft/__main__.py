"""`python -m aslora_meft`, as `torchrun` and `accelerate launch` start it."""

from aslora_meft.cli import main

raise SystemExit(main())
