"""How the threads of CPU arithmetic wait for each other. No torch here: it must be set before torch is imported."""

# By default OpenMP threads spin at their barriers. Beside an API process on the same cores they spin on the core that
# the other thread needs: 8 sequences of a tiny model on 2 busy cores took 10.8 s spinning and 0.9 s sleeping.
WAIT_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
