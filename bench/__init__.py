"""What it costs, and what the knowledge buys: python -m bench.NAME."""
