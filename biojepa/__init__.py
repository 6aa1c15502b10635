"A world model for cells: from a control state and an action to the treated state."
__version__ = "0.1.0"
