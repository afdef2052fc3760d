// SPDX-License-Identifier: GPL-2.0-only
/*
 * A driver for the virtio memory balloon device, in place of virtio_balloon,
 * with a walk queue: module parameters, init and exit.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/time64.h>

#include "hotplug.h"
#include "vbw.h"

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

static int __init vbw_init(void)
{
	int err;

	err = vbw_hotplug_init();
	if (err)
		return err;
	err = vbw_memmap_init();
	if (err)
		goto err_hotplug;
	vbw_debugfs_init();
	err = register_virtio_driver(&vbw_driver);
	if (err)
		goto err_debugfs;
	return 0;

err_debugfs:
	vbw_debugfs_exit();
	vbw_memmap_exit();
err_hotplug:
	vbw_hotplug_exit();
	return err;
}
module_init(vbw_init);

static void __exit vbw_exit(void)
{
	unregister_virtio_driver(&vbw_driver);
	vbw_debugfs_exit();
	vbw_memmap_exit();
	vbw_hotplug_exit();
}
module_exit(vbw_exit);

MODULE_DESCRIPTION("Virtio balloon driver with a free page walk queue");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
