"""Old trials of SageMaker Debugger: its names, and the folders that its hook (smdebug) wrote, without smdebug."""
