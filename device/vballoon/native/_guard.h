// SPDX-License-Identifier: Apache-2.0
/* Declarations that the files of the extension _guard share. */
#ifndef VBALLOON_GUARD_H
#define VBALLOON_GUARD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#pragma GCC visibility push(hidden)

#define CALLED(name) PyObject *name(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
CALLED(native_signal);
CALLED(native_report_sigsys);

#pragma GCC visibility pop
#endif
