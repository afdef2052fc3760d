// SPDX-License-Identifier: GPL-2.0-only
/*
 * A driver for the virtio memory balloon device, in place of virtio_balloon,
 * with a walk queue: init and exit.
 */
#include <linux/module.h>

#include "debugfs.h"
#include "device.h"
#include "hotplug.h"
#include "memmap.h"

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
