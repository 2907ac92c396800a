"""Benchmarks: ratios taken within one run, beside what a user would pick instead."""
