"""What crosses the wire: adapters in PEFT's format with their manifest, written, read and checked."""
