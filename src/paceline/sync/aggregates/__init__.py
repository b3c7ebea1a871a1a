"""How the updates of a round's clients become one: the mean, or a rule that some false ones cannot lead astray."""
