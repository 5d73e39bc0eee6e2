"""The live demonstration: one session, known to several processes, ended in all of them at once; the delay of each.

`node` is one process, `messages` what it is told and answers, `cut` how its feed is cut off; `nodes` starts and ends
such processes, `measuring` lets them measure, `table` and `page` show it. Nothing else of the package uses this.
"""
