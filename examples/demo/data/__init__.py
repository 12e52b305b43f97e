"""The demo's data set: drawings with names, from package registries. `build.build_dataset` is the
way in.
"""
