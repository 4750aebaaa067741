"""Controls beside an optimised prompt, on the same test items: what else could have had the same effect?"""
