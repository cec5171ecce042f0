"""The machinery below the scripts. Nothing in support/ is the method: believe the names and read on.

No module here imports a script.
"""
