# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: ``python -m tests.bench``.

Everything is a ratio between things measured in turns within one run, because the machines that
this runs on are shared and noisy; absolute times are context.  Each part writes samples, tables
and goals into ``docs/benchmarks.json``, from which ``docs/benchmarks.md`` and the plots are made.
"""
