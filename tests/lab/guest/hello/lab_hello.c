// SPDX-License-Identifier: GPL-2.0-only
/* The smallest module: shows that the build roots and the guests fit each other. */
#include <linux/init.h>
#include <linux/module.h>

static int __init lab_hello_init(void)
{
	pr_info("lab_hello: loaded\n");
	return 0;
}
module_init(lab_hello_init);

static void __exit lab_hello_exit(void)
{
	pr_info("lab_hello: gone\n");
}
module_exit(lab_hello_exit);

MODULE_DESCRIPTION("hello from the lab");
MODULE_LICENSE("GPL");
