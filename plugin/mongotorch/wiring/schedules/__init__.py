"""What a schedule does, from a change in the database to a version that is live.

`scheduling` looks, `counting` says what changed, `measuring` what the live model is worth, `firings` makes a job
of it, `retraining` runs that, on what `news` finds to be new, `judging` lets it go live or not; `registering` is
what people do with schedules, and `parts` wires it all.
"""
