"""What training a head over ranks costs: memory, bytes on the wire, time."""
