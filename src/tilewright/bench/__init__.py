"""Measuring the operations against the machine and against other libraries.

``runner.run`` measures a family, ``report`` and ``plots`` show what a run recorded, ``environment.collect`` says on
what it ran. Nothing is imported before it is asked for: ``environment`` has to work where torch does not.
"""
