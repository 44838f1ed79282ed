"""What happens to finished datasets: they are merged, people are taken out, subsets are exported, they are published."""
