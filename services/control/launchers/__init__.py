"""Where the stages of jobs run: on Ray, behind one Protocol (contract.py)."""
