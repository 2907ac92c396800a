"""What drives the things that run in the sandbox: `claude`, or any program.

In: a started sandbox, grants, a prompt. Out: messages for people, decisions for the record, and
nothing that is believed because something inside said it.
"""
