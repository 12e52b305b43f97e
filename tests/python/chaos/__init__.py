"""Real processes killed, paused and lied to by their storage, at random under a seed. What ranks
were served is compared with a run that nothing disturbed: `make chaos`.
"""
