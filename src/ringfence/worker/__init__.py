"""Station 3, the worker: carries out one attempt of a run.

In: a `RunRequest` and a `CompiledPolicy`. Out: a `RunResult`, the run's directory below the state
directory, and the audit log's record of everything in between. `ringfence run` is one attempt;
there is no second orchestrator.
"""
