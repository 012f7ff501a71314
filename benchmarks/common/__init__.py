"""What every benchmark shares: cases, inputs, clocks, the machine, the oracle, tables."""
