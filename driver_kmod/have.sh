#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Ask the compiler what the kernel's headers declare: stable releases carry
# changes that their version number does not show, and a name in a header may be
# within an #ifdef that this configuration leaves out.
#
# usage: have.sh COMPILER FLAGS... >vbw_have.h

compiles()
{
	printf '%s\n' "$code" | "$@" -w -Werror=implicit-function-declaration \
		-DKBUILD_MODNAME='"x"' -fsyntax-only -x c - >/dev/null 2>&1
}

have()
{
	name=$1
	code=$2
	shift 2
	if compiles "$@"; then
		echo "#define $name 1"
	fi
}

code='#include <linux/mm.h>'
if ! compiles "$@"; then
	echo "have.sh: the compiler does not take <linux/mm.h>: $*" >&2
	exit 1
fi

have VBW_HAVE_BALLOON_FINALIZE '#include <linux/balloon_compaction.h>
void f(struct page *p) { balloon_page_finalize(p); }' "$@"
have VBW_HAVE_BALLOON_H '#include <linux/balloon.h>
struct balloon_dev_info i;' "$@"
have VBW_HAVE_BALLOON_MANAGED '#include <linux/balloon.h>
struct balloon_dev_info i = { .adjust_managed_page_count = 1 };' "$@"
have VBW_HAVE_PAGE_TYPE_NUMBER '#include <linux/mm.h>
int i = PGTY_buddy;' "$@"
have VBW_HAVE_VIRTQUEUE_INFO '#include <linux/virtio_config.h>
struct virtqueue_info i = { .name = 0 };' "$@"
have VBW_HAVE_SHRINKER_ALLOC '#include <linux/shrinker.h>
void f(void) { shrinker_alloc(0, "x"); }' "$@"
have VBW_HAVE_NODE_SCAN '#include <linux/mmzone.h>
enum node_stat_item i = PGSCAN_KSWAPD;' "$@"
have VBW_HAVE_REPORTING_CAPACITY '#include <linux/page_reporting.h>
struct page_reporting_dev_info i = { .capacity = 1 };' "$@"
have VBW_HAVE_HVO_KEY '#include <linux/page-flags.h>
void *f(void) { return &hugetlb_optimize_vmemmap_key; }' "$@"
have VBW_HAVE_SHUTDOWN '#include <linux/virtio.h>
struct virtio_driver i = { .shutdown = 0 };' "$@"
exit 0
