"""What runs on the cluster: needs a locked dependency, and the project's own package."""

import humanize
from counting import count_to

print(f"counted to {humanize.intcomma(count_to(12345))}")
