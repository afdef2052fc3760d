// SPDX-License-Identifier: GPL-2.0-only
/* The parameters of the module, within bounds. */
#include <linux/minmax.h>
#include <linux/module.h>
#include <linux/time64.h>

#include "params.h"

/* Above a second a slice would be no bound at all. */
#define SLICE_US_MAX 1000000u
#define BUFFERS_MAX 1024u

static unsigned int slice_us = 50;
module_param(slice_us, uint, 0644);
MODULE_PARM_DESC(slice_us, "longest time in microseconds to hold a zone's lock during a walk");

static unsigned int buffers = 8;
module_param(buffers, uint, 0444);
MODULE_PARM_DESC(buffers, "buffers of 32 KiB that a walk may have under way");

/**
 * vbw_slice_ns - the bound on holding a zone's lock
 *
 * Return: nanoseconds, at least 1000.
 */
unsigned int vbw_slice_ns(void)
{
	return clamp(READ_ONCE(slice_us), 1u, SLICE_US_MAX) * (unsigned int)NSEC_PER_USEC;
}

/**
 * vbw_buffer_count - how many buffers a walk may have under way
 *
 * Return: at least 1.
 */
unsigned int vbw_buffer_count(void)
{
	return clamp(buffers, 1u, BUFFERS_MAX);
}
