"""Does anything get lost or silently change when a run is disturbed? A small run, disturbed by a seeded schedule.

`./run.sh faults --minutes=N --seed=S` draws faults (kinds.py) and judges each by what the run ends with (campaign.py).
"""
