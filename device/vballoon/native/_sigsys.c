// SPDX-License-Identifier: Apache-2.0
/*
 * One line for a system call that the sandbox refused, then the end of the process.
 *
 * A seccomp filter with SECCOMP_RET_TRAP does not execute the call but raises SIGSYS.  The default
 * action would end the process without saying which call it was.
 */
#include "_guard.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

enum { PREFIX_MAX = 400, EXIT_SIGSYS = 128 + SIGSYS };

static char prefix[PREFIX_MAX];
static size_t prefix_length;

static void on_sigsys(int number, siginfo_t *info, void *context)
{
	char line[PREFIX_MAX + 16], digits[12];
	size_t at = prefix_length, n = 0;
	unsigned int call = (unsigned int)info->si_syscall;

	(void)number;
	(void)context;
	memcpy(line, prefix, prefix_length);
	do
		digits[n++] = (char)('0' + call % 10);
	while (call /= 10);
	while (n)
		line[at++] = digits[--n];
	line[at++] = '\n';
	if (write(STDERR_FILENO, line, at) < 0)
		_exit(EXIT_SIGSYS);
	_exit(EXIT_SIGSYS);
}

/* report_sigsys(prefix) -> None: at a refused call, write prefix and number to stderr and exit. */
CALLED(native_report_sigsys)
{
	struct sigaction action;
	Py_ssize_t length;
	char *text;

	(void)module;
	if (nargs != 1) {
		PyErr_SetString(PyExc_TypeError, "report_sigsys(prefix)");
		return NULL;
	}
	if (PyBytes_AsStringAndSize(args[0], &text, &length) < 0)
		return NULL;
	prefix_length = (size_t)length < PREFIX_MAX ? (size_t)length : PREFIX_MAX;
	memcpy(prefix, text, prefix_length);
	memset(&action, 0, sizeof(action));
	action.sa_sigaction = on_sigsys;
	action.sa_flags = SA_SIGINFO;
	sigemptyset(&action.sa_mask);
	if (sigaction(SIGSYS, &action, NULL) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}
