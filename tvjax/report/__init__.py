"""What the library shows: statistics of measurements, tables, plots."""
