"""Other libraries on vramkit: bitsandbytes' operators, PEFT adapters, transformers' checkpoints.

Each module imports its library only when one of its functions is called.
"""
