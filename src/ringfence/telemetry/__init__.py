"""Beside the road: what an operator is told while it happens, as metrics, traces and log lines.

In: what the processes outside the sandbox know: events on their way to the record, notices of
egress, turns, requests, the queue's numbers. Out: a page for Prometheus, spans for a collector.

Who could lie: whoever is inside decides how often a thing happens, and names of tools and models.
Never which series exist (`labels`), nor what a span is called or belongs to (`spans`): ids come
from out here, and nothing that a sandbox says is taken for a trace's context. Nothing here can
fail a run: a fault is logged once, and the run goes on untold. The audit log is the record; this is
not.

Without settings none of it is imported beyond what the processes themselves need.
"""
