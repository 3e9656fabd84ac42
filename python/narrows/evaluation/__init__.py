"""What a result is measured by: baselines, and the measures of count models."""
