"""Measure: workloads, load generator, in-process latency and throughput, and the report that every benchmark prints."""
