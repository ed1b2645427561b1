"""`svcli eval` and `svcli sweep`: tasks, ways to answer them, and what came of it. Imports no torch."""
