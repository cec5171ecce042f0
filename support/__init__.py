"""The machinery below the scripts, none of which is imported here. Nothing in support/ is the method."""
